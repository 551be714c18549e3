"""What one does with models: recipes, evaluation, benchmarks, reports."""
