"""Named defaults. A recipe is a mapping from stage to a function (model, data, out) -> config; the user's words win."""
