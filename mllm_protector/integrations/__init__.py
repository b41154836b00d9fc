"""The guard as a part of other libraries."""
