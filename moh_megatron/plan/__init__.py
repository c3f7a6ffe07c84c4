"""Plans a run from its configuration alone, without torch and GPU: memory, operations, communication."""
