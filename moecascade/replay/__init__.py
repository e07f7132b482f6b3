"""What can be told without an engine: how policies fare on recorded requests, what steps will take.

`player` plays the policies of `core`, untouched, in an engine that is simulated around them.
`planning` says from a model's configuration and a device's data sheet what a step takes there.
Nothing here starts a server or needs a GPU.
"""
