"""How good a model is: validation loss, tasks of lm-eval, comparisons."""
