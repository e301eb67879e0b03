/* ---- the far field of a state: copied, moved to other references, merged ---- */
#ifndef NF_FAR_STATE_READY
#define NF_FAR_STATE_READY

/* A state's R, z, S [m][dim] into the workspace or back, there S in panels of `panel` dims, each [m][panel]. */
NF_UNUSED static void nf_state_copy(nf_state_unit *state, int m, int dim, int panel, float *r, float *z, float *s,
                                    int store)
{
    float *at = (float *)(void *)(state + 1);
    const size_t sums = (size_t)m * sizeof(float);
    memcpy(store ? at : r, store ? r : at, sums);
    memcpy(store ? at + m : z, store ? z : at + m, sums);
    for (int v0 = 0; v0 < dim; v0 += panel) {
        const size_t used = (size_t)(dim - v0 < panel ? dim - v0 : panel) * sizeof(float);
        for (int i = 0; i < m; i++) {
            float *here = s + v0 * m + i * panel, *there = at + 2 * m + i * dim + v0;
            memcpy(store ? there : here, store ? here : there, used);
        }
    }
}

NF_UNUSED static void nf_state_empty(int m, int width, float *r, float *z, float *s)
{
    memset(z, 0, (size_t)m * sizeof(float));
    memset(s, 0, (size_t)m * (size_t)width * sizeof(float));
    for (int i = 0; i < m; i++)
        r[i] = NF_NO_KEY;
}

/* From the references r to those in `to`, whole numbers: the factors are powers of two, exact. */
NF_UNUSED static void nf_rescale(float *r, float *z, float *s, int m, int width, int panel, const float *to)
{
    for (int i = 0; i < m; i++) {
        const float factor = nf_power_of_two(r[i] - to[i]);
        if (to[i] > r[i]) {
            z[i] *= factor;
            for (int v0 = 0; v0 < width; v0 += panel)
                for (int d = 0; d < panel; d++)
                    s[v0 * m + i * panel + d] *= factor;
        }
        r[i] = to[i];
    }
}

/* to = left a + b of one unit, on the larger of both references; `to` may be a or b. */
static void nf_far_join(const nf_contract *c, nf_state_unit *to, const nf_state_unit *a, const nf_state_unit *b,
                        float left)
{
    const int m = (int)c->features, dim = (int)c->values;
    const float *x = (const float *)(const void *)(a + 1), *y = (const float *)(const void *)(b + 1);
    float *sums = (float *)(void *)(to + 1);
    const float top = x[0] > y[0] ? x[0] : y[0];
    to->mass = a->mass * nf_power_of_two(x[0] - top) + b->mass * nf_power_of_two(y[0] - top);
    for (int i = 0; i < m; i++) {
        const float r = x[i] > y[i] ? x[i] : y[i];
        const float fa = left * nf_power_of_two(x[i] - r), fb = nf_power_of_two(y[i] - r);
        sums[i] = r;
        sums[m + i] = x[m + i] * fa + y[m + i] * fb;
        for (int d = 0; d < dim; d++)
            sums[2 * m + i * dim + d] = x[2 * m + i * dim + d] * fa + y[2 * m + i * dim + d] * fb;
    }
}

NF_UNUSED static void nf_far_merge(const nf_contract *c, const nf_state_head *head, nf_state_unit *to,
                                   const nf_state_unit *a, const nf_state_unit *b)
{
    (void)head;
    nf_far_join(c, to, a, b, 1);
}

#endif
