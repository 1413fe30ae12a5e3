"""Speed alone, each against a named baseline in one run."""
