"""The policy `marginal`: `rule` decides, the other modules are what it knows.

`acceptance` judges a draft by its text (`predictor`, compiled), `recent` by how the last ones
fared; `allocation` shares a batch's slots out; `draft_length` says how far a model should draft.
"""
