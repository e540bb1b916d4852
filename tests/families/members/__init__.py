"""The members of the zoo, one module per kind of architecture."""
