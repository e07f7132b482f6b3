"""What speculation would cost and gain on a model and a device that are not here.

From a model's configuration and a device's data sheet to the time of a step: what is read, what is
computed, what is launched. Nothing here measures, serves or needs a GPU; what is measured belongs
into `evaluation`. Numbers of models, devices and other people's measurements lie in JSON files
beside the code, each with its source.
"""
