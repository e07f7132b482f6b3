"""What an engine leaves behind for people and for later: step log, traces, the files they lie in.

One schema each, read and written here and nowhere else. Nothing here decides anything.
"""
