"""The algorithm alone: from what a step reported to the draft length of the next one.

Pure: no clock, no randomness, no input or output, no engine. The same policy objects run in replay,
in simulation and in vLLM. Standard library and numpy, and numba where `marginal` is made; of this
package only `errors`.
"""
