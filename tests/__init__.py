"""Tests: a file for each script, and one for each module that has tests of its own."""
