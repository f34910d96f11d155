"""Training and evaluation of classification networks (paper, Sect. 4.1)."""
