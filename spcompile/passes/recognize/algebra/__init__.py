"""What operands are to each other: named dims, contractions, polynomials."""
