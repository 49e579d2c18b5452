"""The search over bases and coefficients, as pure decisions on measured accuracies."""
