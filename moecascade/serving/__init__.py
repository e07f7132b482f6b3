"""Starting vLLM with the plugin and keeping it: command line, process, machine.

What vLLM does itself (HTTP, scheduling, distribution) is not done again here.
"""
