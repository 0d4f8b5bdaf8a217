"""Differential privacy on the scalars: clipping, mechanisms, accounting, budgets."""
