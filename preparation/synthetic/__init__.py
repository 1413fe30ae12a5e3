"""Drawn data: digits, faces and objects that need no network and no download."""
