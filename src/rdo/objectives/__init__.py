"""The paper's formulas: losses, coefficients, intervals."""
