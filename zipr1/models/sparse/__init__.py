"""models/sparse: which prompt tokens each decoder layer keeps, and attention among those alone."""
