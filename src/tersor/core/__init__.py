"""The concepts: types that everything else is written in."""
