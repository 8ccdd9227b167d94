"""What is trained: studies, cells, families, corpora, training. Never imports ray or mlflow."""
