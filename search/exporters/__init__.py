"""What a packed model can be handed over as: one file and one row of `table` per target."""
