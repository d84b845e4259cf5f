"""One file a group of commands; what they share is in shared.py."""
