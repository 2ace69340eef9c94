"""What a candidate costs on hardware: one class per cost, lower is better."""

PROJECT = "bitfront"
