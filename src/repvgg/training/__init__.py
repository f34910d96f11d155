"""Training: one loop for every task; classification, its task and evaluation (Sect. 4.1)."""
