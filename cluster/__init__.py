"""Where and how cells run: Ray workers, the driver, the ledger, the MLflow mirror."""
