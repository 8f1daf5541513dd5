"""What a user's module may do: raise at import, in several lines."""

raise RuntimeError("an error of\ntwo lines")
