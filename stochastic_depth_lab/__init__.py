"""The laboratory: trains, measures and reports, with the `stochastic_depth` library."""
