"""How good a model's answers are: a judge scores each against a reference, or prefers one of two."""
