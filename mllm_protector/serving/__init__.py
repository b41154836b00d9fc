"""The guard in front of a served model."""
