"""What routing costs and what a cache would save: evaluation, recurrence, traces, simulator, figures."""
