"""Reads and writes files and folders: writes are atomic, and errors name the file."""
