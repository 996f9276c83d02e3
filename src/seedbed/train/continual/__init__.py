"""What a model keeps while it learns a new domain: texts and weights to hold it to, and how they are used."""
