"""mlx_moecache: Mixture-of-Experts models larger than memory, on MLX."""

__version__ = "0.1.0"
