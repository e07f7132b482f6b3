"""The command line. It asks the package to do things and prints what came of it."""
