"""A mixed load as a day's peak would bring it, driven by k6 against everything that `sessiongate up` runs."""
