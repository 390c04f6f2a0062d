"""files_with_suffix: the files of one kind among many, so that a test runs again only for its kind."""

def _files_with_suffix_impl(ctx):
    files = [f for f in ctx.files.srcs if f.basename.endswith(tuple(ctx.attr.suffixes))]
    return [DefaultInfo(files = depset(files), runfiles = ctx.runfiles(files))]

files_with_suffix = rule(
    implementation = _files_with_suffix_impl,
    attrs = {
        "srcs": attr.label_list(mandatory = True, allow_files = True),
        "suffixes": attr.string_list(mandatory = True),
    },
)
