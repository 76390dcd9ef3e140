"""Writes captions for recordings that have none: from measurements, or with language models on servers."""
