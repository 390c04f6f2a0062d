"""Other programs that run our drafts, one package for each."""
