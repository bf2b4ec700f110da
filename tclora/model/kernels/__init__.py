"""Parts of a frozen causal LM computed with fewer passes over memory than the model's own code.

Each stands in for a module or function of transformers, gives its values up to rounding and its
gradients with respect to the input alone: weights of the base are never trained. They are plain
tensor operations, so that they run wherever torch does; they were chosen by measurement on CPUs
(``benchmarks/training.py``).
"""
