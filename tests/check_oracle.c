/* The two ways in which the oracle computes favor agree: the definition pair by pair, and with the sums exchanged. */
#include "oracle.h"

#include <stdio.h>

enum { D = 16, ROWS = 24, TOKENS = 60, QUERIES = 50 };

static double distance(const double *a, const double *b, int count)
{
    double most = 0;
    for (int i = 0; i < count; i++)
        most = fmax(most, fabs(a[i] - b[i]) / fmax(1, fabs(b[i])));
    return most;
}

int main(void)
{
    static float q[TOKENS * D], k[TOKENS * D], v[TOKENS * D], w[ROWS * D];
    static double out[2][QUERIES * D], lse[2][QUERIES];
    oracle_random r = {5};
    double worst = 0;
    for (int i = 0; i < ROWS; i++)
        oracle_vector(&r, w + i * D, D, 4);
    for (int kind = 0; kind < ORACLE_KINDS; kind++)
        for (int way = 0; way < 8; way++) {
            oracle_calibration c;
            oracle_head h;
            memset(&h, 0, sizeof h);
            oracle_inputs((oracle_kind)kind, 40, 0, 7, D, QUERIES, TOKENS, q, k, v);
            c = oracle_calibrate(q, QUERIES, 0, k, TOKENS, 0, D, 0, 0, 0);
            h.q_tokens = QUERIES, h.kv_tokens = TOKENS, h.dim = D;
            h.q = q, h.k = k, h.v = v, h.w = w, h.rows = ROWS;
            h.cosh = way & 1, h.full = way >> 1 & 1, h.calibration = way & 4 ? &c : NULL;
            oracle_favor(&h, out[0], lse[0]);
            oracle_favor_pairs(&h, out[1], lse[1]);
            worst = fmax(worst, distance(out[0], out[1], QUERIES * D));
            worst = fmax(worst, distance(lse[0], lse[1], QUERIES));
            oracle_calibration_free(&c);
        }
    printf("%g\n", worst);
    return worst < 1e-10 ? 0 : 1;
}
