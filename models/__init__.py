"""The networks. They know no command line, path, device or print."""
