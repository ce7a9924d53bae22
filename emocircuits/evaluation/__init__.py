"""Judging generated text: emotion (judges, expression), cost (fluency), certainty (statistics).

Importing this package loads nothing heavy: import the module you need, such as `evaluation.judges`.
"""
