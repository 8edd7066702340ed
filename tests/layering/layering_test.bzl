"""Who may depend on whom, as queries over the build graph whose output must be empty."""

def layering_test(name, scope, of, forbidden, why, allow_none = False):
    """Fails if any target of `scope`'s closure that matches `of` reaches, over any path, one that matches `forbidden`.

    Args:
      name: of the test.
      scope: labels of binaries whose whole closure is looked at.
      of: Java regular expression of labels: whose dependencies are judged.
      forbidden: likewise: what must not be among them.
      why: said when the test fails.
      allow_none: `of` may match nothing (yet); otherwise that fails too, so that a rename cannot blind the test.
    """
    subjects = 'filter("%s", deps(%s))' % (of, " + ".join(scope))
    native.genquery(
        name = name + "_subjects",
        testonly = True,
        expression = subjects,
        scope = scope,
    )
    native.genquery(
        name = name + "_violations",
        testonly = True,
        # Each line is a target that must not be reached.
        expression = 'filter("%s", deps(%s))' % (forbidden, subjects),
        scope = scope,
    )
    native.sh_test(
        name = name,
        size = "small",
        srcs = ["layering_test.sh"],
        args = [
            "$(location :%s_subjects)" % name,
            "$(location :%s_violations)" % name,
            "true" if allow_none else "false",
            "'%s'" % why,
        ],
        data = [
            ":%s_subjects" % name,
            ":%s_violations" % name,
        ],
    )
