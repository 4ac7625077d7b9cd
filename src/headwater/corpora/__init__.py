"""What the model reads: curated, mixed, synthesised, formatted."""
