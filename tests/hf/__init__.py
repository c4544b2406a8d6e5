"""Tests of the door to Hugging Face."""
