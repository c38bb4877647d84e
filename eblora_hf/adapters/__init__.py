"""LoRA on a model: where it is, its factors, and the sums of tasks that lie beside it."""
