"""MT-Bench: 80 two-turn questions, answered by models and graded by a judge (Zheng et al. 2023, arXiv:2306.05685)."""
