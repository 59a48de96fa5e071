"""One model in a process of its own: loading, batching, tokenizing; and the tools that bring models in.

The only package that imports MLX.
"""
