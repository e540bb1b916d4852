"""A model as its authors publish it beside the weights: no layout, name or base class that this package knows."""
