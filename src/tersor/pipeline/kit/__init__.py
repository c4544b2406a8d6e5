"""What is copied into a bench kit as it is; it imports nothing of tersor."""
