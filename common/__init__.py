"""What two scripts must agree on exactly: command line, device, random numbers, files, runs."""
